"""The page server: a restored process runs before its memory is there (userfaultfd), and finds the pages it needs first in place.

`client` is the owner's side, `main` the process, `fault_handler` its work for one process tree, `working_set` what it copies first."""
