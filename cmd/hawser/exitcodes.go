package main

import "github.com/spf13/cobra"

// exitCodes is a help topic: a command without a function.
func exitCodes() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "what the exit codes mean",
		Long: `Every command ends with one of

  0  done
  1  failed; standard error says what happened, and in a line "hint:" what to do
  2  wrong use: the command line was not understood, and nothing was done

"hawser send" tells how far the command came:

  0  answered: the device has done it
  3  failed on the device
  4  queued: written down, not yet with the device
  5  delivered: the device has it and has not answered
  6  expired: not answered before its time was over
  7  unknown: the device has seen it, but its answer was lost

"hawser demo --for" ends with 1 if anything that was acknowledged is not on disk.`,
	}
}
