"""A cluster for tests: an API that is honest about versions and watches, a scheduler, a kubelet, and pods that are real processes."""
