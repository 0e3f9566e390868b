"""A small HTTP server for one model: requests that wait together are answered together (`./launch.sh serve RUN`)."""
