"""May this snapshot be restored here? Launch options, host, engine and GPU, read and compared (`check`)."""
