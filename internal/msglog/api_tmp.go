package msglog

import (
	"context"
	"errors"
)

var errTmp = errors.New("not yet")

type Log struct{}

func Create(ctx context.Context, cfg Config) error                                { return errTmp }
func Open(ctx context.Context, cfg Config, known State) (*Log, error)             { return nil, errTmp }
func (l *Log) Start(h Hooks) error                                                { return errTmp }
func (l *Log) Close(ctx context.Context) error                                    { return errTmp }
func (l *Log) Append(r *Record) error                                             { return errTmp }
func (l *Log) read(ctx context.Context, from Pos, fn func(*Record) error) error   { return errTmp }
func (l *Log) End() Pos                                                           { return 0 }
func (l *Log) First() Pos                                                         { return 0 }
func (l *Log) Changed() <-chan struct{}                                           { return nil }
func (l *Log) QueueRead(name string, afterSeq uint64, max int) ([]Queued, error)  { return nil, errTmp }
func (l *Log) QueueAck(name string, upToSeq uint64)                               {}
func (l *Log) QueueDrop(name string) error                                        { return errTmp }
func (l *Log) QueueStates(ctx context.Context, fn func(QueueState) error) error   { return errTmp }
func (l *Log) PutRetained(rec *Record) error                                      { return errTmp }
func (l *Log) DeleteRetained(topic string) error                                  { return errTmp }
func (l *Log) LoadRetained(ctx context.Context, fn func(*Record) error) error     { return errTmp }
func (l *Log) History(ctx context.Context, q Query, fn func(*Record) error) error { return errTmp }
func (l *Log) State() State                                                       { return State{} }
func (l *Log) Saved(s State)                                                      {}
func (l *Log) Healthy() error                                                     { return errTmp }
func (l *Log) Stats() Stats                                                       { return Stats{} }

// SetFloor says what retention must keep. checkpoint: up to which retained
// messages, QoS 2 state and queues are persisted elsewhere; frames at or after
// it never go. cursor: the lowest persistent cursor (or checkpoint when there
// is none); the age limit waits for it, the size limit overtakes it, which is
// counted and logged.
func (l *Log) SetFloor(checkpoint, cursor Pos) {}
