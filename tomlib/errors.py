"""The one exception of the package: something the user can put right.

It quotes what files, libraries and servers said, in one line and without keys.
"""


class TomError(Exception):
    """What went wrong, where (file and entry) and what to do, in one line.

    The command line prints it and exits with 2; a notebook shows the line without a traceback.

    >>> raise TomError("profile 'quik': no such file; did you mean 'quick'?")
    Traceback (most recent call last):
    ...
    tomlib.errors.TomError: profile 'quik': no such file; did you mean 'quick'?
    """

    def __str__(self) -> str:
        return printable(super().__str__())

    def _render_traceback_(self) -> list[str]:
        """Read by IPython in place of the traceback."""
        return [f"Error: {self}"]


def printable(text: str) -> str:
    r"""A text in one line that cannot steer a terminal: line ends, escapes, marks of direction shown.

    Messages quote what models, servers and files said.

    >>> print(printable("a\x1b[31mb\n"))
    a\x1b[31mb\n
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def short(error: Exception, secret: str = "") -> str:
    r"""The error of a library or a server in one line, for a message of ours to quote.

    Args:
        error: What was raised.
        secret: A key that is taken out of it.

    >>> short(ValueError("no such\nlayer"))
    'ValueError: no such layer'
    """
    line = " ".join(without(secret, str(error)).split())
    return f"{type(error).__name__}: {line[:300]}"


def without(secret: str, text: str) -> str:
    """A text with every occurrence of a secret starred out; as it is where there is no secret."""
    return text.replace(secret, "***") if secret else text
