"""What is wrong with a chat template; apart from what runs one, which only a conversation needs."""


class TemplateError(ValueError):
    """A template that is none, that fails at these messages, or that refuses them."""


class Refusal(TemplateError):
    """What a template says by raise_exception."""
