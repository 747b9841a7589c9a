"""How what is wrong with a file or a field becomes one line."""

import struct

import pytest

from common.errors import InputError, reading


def test_an_input_error_is_one_short_line():
    assert str(InputError("a\nb\x1b[2J\ud800\u202eß")) == r"a\nb\x1b[2J\ud800\u202eß"
    assert len(str(InputError("n" * 1_000_000))) < 2100


@pytest.mark.parametrize("error, text", [
    (ValueError("bad\nnews"), "f: is damaged or of another kind: ValueError: bad"),
    (KeyError("x"), "f: expected a field 'x'"), (OSError(5, "Input/output error", "f"), "f: Input/output error"),
    (InputError("no z"), "f: no z"), (InputError("f: line 3"), "f: line 3"), (struct.error("x"), "f: .* x"),
    (EOFError(), "f: .*EOFError"), (RuntimeError("y" * 999), "f: .*y{200}$"),
])
def test_what_a_parser_raises_names_the_file_once(error, text):
    with pytest.raises(InputError, match=f"^{text}"):
        with reading("f"):
            raise error


def test_other_exceptions_pass():
    for error in (KeyboardInterrupt(), SystemExit(3), NameError("a fault of ours")):
        with pytest.raises(type(error)):
            with reading("f"):
                raise error
