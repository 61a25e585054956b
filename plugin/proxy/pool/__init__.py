"""The replicas behind one name: choose the next one for a request, wake them, put them to sleep, measure how long starts take."""
