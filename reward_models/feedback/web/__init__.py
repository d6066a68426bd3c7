"""The page where people annotate: plain HTML forms over a `FeedbackStore`.

Needs the extra `feedback`. Where tasks come from is decided by whoever fills the store.
"""

try:
    import fastapi  # noqa: F401
    import jinja2  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the annotation page needs the extra 'feedback', {error.name} is missing: "
        "pip install 'rlhf-gym[feedback]'",
        name=error.name,
    ) from error

from reward_models.feedback.web.app import make_app, serve, set_up_account

__all__ = ["make_app", "serve", "set_up_account"]
