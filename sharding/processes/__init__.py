"""The processes of one run: discovery, coordination (barriers, broadcasts), and a watchdog that ends all with one."""
