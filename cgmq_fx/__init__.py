"""Constraint guided quantization: a trained PyTorch model, under hard bounds on what it costs.

The public names are listed in `cgmq_fx.api`. They are loaded when the first of them is used, so
that what needs no PyTorch, such as `cgmq-fx --help`, does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from cgmq_fx.requirements import check_torch, own_version

check_torch()
if TYPE_CHECKING:
    from cgmq_fx.api import *  # noqa: F403

    __version__: str
else:

    def __getattr__(name):  # noqa: ANN001, ANN202 - hidden from type checkers, which see the names
        if name == "__all__" or not name.startswith("__"):
            api = import_module("cgmq_fx.api")
            globals().update({public: getattr(api, public) for public in ["__all__", *api.__all__]})
        if name == "__version__":
            globals()[name] = own_version()
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__():  # noqa: ANN202
        return sorted({*globals(), *import_module("cgmq_fx.api").__all__})
