"""Training text of the proxies: a corpus by domain, its topics, and streams of rows that follow a mix."""
