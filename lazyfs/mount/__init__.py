"""One mount: its client (`client`), its process (`daemon`, `server`), its request handling (`service`), and kernel calls."""
