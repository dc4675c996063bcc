"""Where models come from and go to: fetched, put together, fused, exported."""
