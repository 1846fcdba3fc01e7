"""How processes start, watch over each other, and end."""
