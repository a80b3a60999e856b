"""Reports: charts, tables and pages about runs; `dmagent report` and the demo write them."""
