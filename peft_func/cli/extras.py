"""Optional dependencies, looked for where they are needed, so that the core alone is enough to import the package."""

import importlib
from typing import Any

from peft_func.errors import MissingExtraError


def require(module: str, extra: str = "demo") -> Any:
    """Import a module of an extra and return it.

    Args:
        module: its name, such as `"sklearn.datasets"`.
        extra: the extra of peft_func that installs it.

    Raises:
        MissingExtraError: it is not installed; the message holds the command that installs it.

    Example:
        >>> from peft_func.cli.extras import require
        >>> require("json").loads("[1]")
        [1]
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{package} is needed and cannot be imported ({error}); install it with: pip install 'peft_func[{extra}]'"
        ) from error
