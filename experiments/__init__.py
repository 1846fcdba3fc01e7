"""One folder per study; README.md lists them."""
