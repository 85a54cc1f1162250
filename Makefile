# The three commands of the README. Each works in a fresh clone.
.PHONY: run test bench

# A fleet in a temporary directory. Needs Go and nothing else; a cold build takes about a minute.
run:
	@echo "building (about a minute the first time) ..."
	go run ./cmd/hawser demo

# Installs what the tests need (as root on Debian; otherwise says what is missing), then runs everything.
test:
	@scripts/test

# Hawser and mosquitto side by side; writes bench.json.
bench:
	@scripts/tools mosquitto
	go run ./cmd/hawser-bench $(BENCH)

# Takes the security checks out one at a time and sees a test go red for each.
.PHONY: mutants
mutants:
	go run scripts/mutants.go $(MUTANTS)
