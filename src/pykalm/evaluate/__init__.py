"""How good it is: filtered ranking and link prediction."""
