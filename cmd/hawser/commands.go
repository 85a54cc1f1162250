package main

import "github.com/spf13/cobra"

// commands lists what stands directly below hawser. Each has a file of its name.
func (a *app) commands() []*cobra.Command {
	return []*cobra.Command{
		a.initCommand(),
		a.serveCommand(),
		a.deviceCommand(),
		a.tailCommand(),
		a.statusCommand(),
		a.serviceCommand(),
		a.caCommand(),
		a.factoryCommand(),
		a.sendCommand(),
		a.commandCommand(),
		a.configCommand(),
		a.demoCommand(),
		a.simCommand(),
		a.auditCommand(),
		a.checkCommand(),
		exitCodes(),
	}
}
