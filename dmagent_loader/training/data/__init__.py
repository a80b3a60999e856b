"""Text for the proxies: a corpus by domain, its topics, and streams of rows in a mix."""
