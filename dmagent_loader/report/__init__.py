"""Tables, charts and HTML pages about runs, over plain data: samplers, trainers and their files are unknown here."""
