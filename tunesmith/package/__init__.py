"""Packaging: the merged model, proved equal to the adapter it came from."""
