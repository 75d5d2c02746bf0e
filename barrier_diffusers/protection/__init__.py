"""The method: statistics, regions, drift, loss, projection and certificate; needs torch and `utils` alone."""
