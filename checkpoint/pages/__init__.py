"""The page server: a restored process runs before its memory is there, and finds the pages it needs first in place.

images     what CRIU's page maps say: which pages a process has, and where they lie in the image files
pagemap    which pages of one address space still have to be brought, through unmaps, moves and forks
uffd       the kernel's userfaultfd calls
workingset the recorded order in which pages are needed, and the file it is kept in
daemon     the server's own process
server     the owner's side: starts it, hears from it, and is told when it dies
"""
