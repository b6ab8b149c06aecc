"""How it looks: tables and figures."""
