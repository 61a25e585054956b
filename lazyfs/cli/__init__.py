"""The command lines of lazyfs: `quickthaw weights` and `quickthaw mount`."""
