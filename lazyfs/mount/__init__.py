"""One mount: started from outside (`client`), its process (`daemon`, `server`), what it does (`service`), and the kernel's side."""
