"""Orders of sampling, one file each: which tokens are revealed at which time.

To add one, add a file to this folder with a subclass of `Order` (or `KnownOrder`) decorated by `@register("name")`.
`--sample_order name` then finds it. No other file changes.
"""

from models.registry import import_files
from models.samplers.orders.base import ORDERS, KnownOrder, Order, register  # noqa: F401  (the package's interface)

import_files(__name__)
