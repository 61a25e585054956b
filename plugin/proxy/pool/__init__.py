"""The replicas behind one name: who gets the next request, who is woken, who is put to sleep, and how long starts take."""
