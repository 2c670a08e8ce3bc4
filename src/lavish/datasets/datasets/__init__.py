"""The dataset classes of the zoo: annotation files and pictures in, samples as LAVIS's models take them out."""
