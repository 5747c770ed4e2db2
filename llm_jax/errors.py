"""The one exception that means a person, not the code, made the mistake."""


class InputError(ValueError):
    """A mistake in what a person gave: a flag, a config, a file, a prompt.

    Its message is one line that names the value, the rule and the remedy. Commands print that line
    and exit with code 2; anything else that escapes is a bug and keeps its traceback.
    """
