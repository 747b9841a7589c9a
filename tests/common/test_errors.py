"""How what is wrong with a file, a field or the memory becomes one line."""

import pickle
import struct
import zipfile

import pytest

from common.errors import InputError, error_prefix, explain_out_of_memory, reading
from tests.common.helpers import refused


def test_an_input_error_is_one_short_line():
    assert str(InputError("a\nb\x1b[2J\ud800\u202eß")) == r"a\nb\x1b[2J\ud800\u202eß"
    assert len(str(InputError("n" * 1_000_000))) < 2100


@pytest.mark.parametrize("error, text", [
    (ValueError("bad\nnews"), "f: is damaged or of another kind: ValueError: bad"),
    (KeyError("x"), "f: expected a field 'x'"), (OSError(5, "Input/output error", "f"), "f: Input/output error"),
    (InputError("no z"), "f: no z"), (InputError("f: line 3"), "f: line 3"), (RecursionError("deep"), "f: .* deep"),
    (UnicodeError("x"), "f: .* x"), (struct.error("x"), "f: .* x"), (zipfile.BadZipFile("x"), "f: .* x"),
    (pickle.UnpicklingError("x"), "f: .* x"),
    (EOFError(), "f: .*EOFError"), (RuntimeError("y" * 999), "f: .*y{200}$"), (IndexError("x"), "f: .* x"),
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


def test_a_prefix_is_of_input_errors_alone():
    with refused("where: what"), error_prefix("where"):
        raise InputError("what")
    with pytest.raises(ValueError, match="^what$"), error_prefix("where"):
        raise ValueError("what")


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 5 bytes\nmore"),
    RuntimeError("CUDA out of memory. Tried"), RuntimeError("could not create a primitive")])
def test_a_lack_of_memory_says_what_was_done(error):
    with refused("out of memory: a step: "), explain_out_of_memory("a step"):
        raise error
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory("a step"):
        raise RuntimeError("shapes differ")
