"""What would have to hold for the shares of time that the paper's body gives."""
