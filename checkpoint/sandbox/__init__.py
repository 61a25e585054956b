"""The sandbox that an engine runs in: its first process (`init`), the owner's side (`sandbox`), and prestarted helpers (`prestart`)."""
