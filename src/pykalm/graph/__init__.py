"""What is known: knowledge graphs, known answers, reading and checking files, named graphs."""
