"""Reports are made of sweeps' plans here, as `tsae report` makes them."""

from tests.sweep.conftest import home, plan_of, write_sweep

__all__ = ["home", "plan_of", "write_sweep"]
