"""How people reach moray: command line, Python API, Ray Serve, dashboards."""
