"""Plans before any chip is rented: whether a run fits, how long it takes, how much data and compute it needs."""
