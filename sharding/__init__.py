"""Device meshes and the table that says how every parameter is split over them."""
