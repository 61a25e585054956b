"""Serve endpoints that the proxy did not start itself: one or several behind one port."""
