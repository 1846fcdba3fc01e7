"""The paper's four toggles for real: eight CPU processes behind Summit's links, emulated, beside their simulation."""
