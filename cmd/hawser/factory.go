package main

import "github.com/spf13/cobra"

func (a *app) factoryCommand() *cobra.Command {
	return group("factory", "make units at the flashing bench, and bring them to the fleet", `factory is both ends of making units. At the flashing bench, which may be offline:
"init" sets a bench up in a directory of its own, "load" takes a block of ids in, "run"
turns blank units into devices, "verify" reads one back, "enrol-csr" is for firmware
that makes its own key. On the server "reserve" gives a bench its ids, and "import" takes
in the journal that comes back. No private key is ever in one of these files.`,
		a.factoryReserve(), a.factoryInit(), a.factoryLoad(), a.factoryRun(), a.factoryVerify(), a.factoryEnrol(), a.factoryChild(),
		a.factoryImport(), a.factoryStation(), a.factoryJournal())
}
