"""One file per op: public function, reference, fake, samples, cost."""
