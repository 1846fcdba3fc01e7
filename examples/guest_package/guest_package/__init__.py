"""One of each part that a package can add to tedlab. Importing it registers those that have a name."""

from guest_package import model, router, schedule, token_path

__all__ = ["model", "router", "schedule", "token_path"]
