"""A file that a variable names: a password, a private key, or a certificate.

What it does: reads it once, at the start, and says what is wrong with it and how to fix
that. What it does not: know what it is for.

Invariant: no problem that is told here holds a character of what stands in the file.
"""

import os
from pathlib import Path

# As long as a string of MQTT may be (its specification, section 1.5.3).
PASSWORD_BYTES_MAX = 65_535
# Where Docker puts secrets. Inside a container nobody else can read them, and their mode and
# owner there are Docker's doing: on a desktop machine 0444, and we seem to be the owner.
DOCKER_SECRETS = "/run/secrets/"


def read_file(name: str, path: str, problems: list[str], *, is_secret: bool = False) -> str:
    """Return the text of the file that the variable `name` names; "" behind a problem."""
    problem = ""
    try:
        text = Path(path).read_bytes().decode("utf-8")
        is_ours = os.stat(path).st_uid == os.geteuid() and not path.startswith(DOCKER_SECRETS)
    except UnicodeDecodeError:
        problem = "is not UTF-8; write it as plain text (a certificate or key: as PEM)"
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); make it, or let the ingester's user read it"
    else:
        if not text.strip():
            problem = "is empty; put the value into it, or leave the variable empty"
        # As ssh does it: of a file that is not ours, others have decided who may read it.
        elif is_secret and is_ours and is_open_to_others(path):
            problem = f"can be read by others; chmod 600 {path}"
    if problem:
        problems.append(f"{name}: {path!r} {problem}")
    return "" if problem else text


def read_password(name: str, path: str, problems: list[str]) -> str:
    """Return the file's one line; "" behind a problem."""
    password = read_file(name, path, problems, is_secret=True).removesuffix("\n")
    # Other programs that read the same file would take these for a part of the password.
    if set(password) & set("\n\r\0\ufeff") or len(password.encode()) > PASSWORD_BYTES_MAX:
        problems.append(
            f"{name}: {path!r} must hold one line of at most {PASSWORD_BYTES_MAX} bytes, without"
            " CR, NUL or byte order mark"
        )
    return password


def is_open_to_others(path: str) -> bool:
    """Tell whether anyone but its owner may do anything with the file."""
    return bool(os.stat(path).st_mode & 0o077)
