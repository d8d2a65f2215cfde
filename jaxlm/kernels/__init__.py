"""The best library kernel for this chip, each beside a plain reference of the same signature."""
