"""For the tests of lazyfs: models, mounts, faulty stores."""
