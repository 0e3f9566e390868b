"""Plans made before anything is rented: what fits, how long it takes, how much data and compute it needs."""
