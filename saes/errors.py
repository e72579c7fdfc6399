"""The one error type that is meant for users."""


class UserError(ValueError):
    """Bad input that the user can mend; the message is one line with the value and the way out.

    The command line prints it and exits with code 2. Anything else that is raised is a defect.
    """
