"""`python -m study TABLE`: the comparisons of the documentation, each run by a command that anybody can repeat."""
