"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in a config, a command line, a data set or a work directory.

    The message is a single line that names the field or file, the value found and what is
    allowed; the command line prints it as it is and exits with code 2.
    """
