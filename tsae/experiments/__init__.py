"""The experiments of the paper, one command each, on any run; see `driver.EXPERIMENTS`."""
